"""The gallery: pictures of rules on test functions, of schedules, of a transformer, and of every rule."""
