"Normalizing flows: Glow and Flow++."
