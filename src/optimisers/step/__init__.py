"""How does a model take a step?"""
