"""What is a model made of? Containers, which are walked, and arrays, which are stepped."""
