from nsa_convert.kernels.compressed.reference import attend as attend
