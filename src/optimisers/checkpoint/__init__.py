"""How is a state kept? In a file that is safe, named, whole, and read by every framework."""
