"""A trained model as transformers knows models: a configuration, a model and a processor that its Auto classes load."""
