"""How far the activation ranges of modalities differ, and what one shared smoothing factor costs each of them."""
