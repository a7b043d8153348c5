"""What only the chapters use: data, models, training, figures, sliders, claims. Nothing in gradprune imports it."""
