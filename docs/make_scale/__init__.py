"""The page about many devices: what a step costs there, on paper."""
