"""How good a language model is on a text: perplexity, divergence, and scores for `fit`."""
