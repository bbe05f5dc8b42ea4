"""The pages of the rules: what a person says of them, and what they do when they are traced."""
