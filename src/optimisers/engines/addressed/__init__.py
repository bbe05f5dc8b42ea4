"""What do engines of addresses share? Where arrays lie, and how a pass over them is driven."""
