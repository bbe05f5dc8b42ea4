"""Where does the state of a model live, and what does a user hold of it?"""
