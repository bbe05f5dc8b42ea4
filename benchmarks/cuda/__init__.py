"""How fast and how right are steps on a CUDA device?"""
