"""Our rules in the dress of other libraries. Nothing here imports this room."""
