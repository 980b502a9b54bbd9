"""How far a converted model is from the dense model it came from."""
