"""Everything that knows Ray. Knows no pixels: it moves work to machines."""
