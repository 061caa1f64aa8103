"""Files to arrays and back: models, tokenizers, exit branches, tables of n-grams."""
