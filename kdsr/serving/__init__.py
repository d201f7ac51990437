"""The HTTP side of kdsr: what a request may be, who may send it, and how it is answered. Knows no Ray."""
