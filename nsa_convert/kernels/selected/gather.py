from nsa_convert.kernels.selected.reference import attend as attend
