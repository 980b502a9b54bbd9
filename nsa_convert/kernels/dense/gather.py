from nsa_convert.kernels.dense.reference import attend as attend
