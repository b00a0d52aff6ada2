"""Fixed steering from pairs of texts, without training: a direction, its layer and strength, and what it costs."""
