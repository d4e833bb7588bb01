"""The pure half: what to do about what is wanted and what is there. No I/O, no clock, no chance."""
