"""The trainers (LCD, RG-LCD, RG-LCD + LRM), each a numbered step, and the one loop that drives them."""
