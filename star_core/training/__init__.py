"""How the shipped model was made: data, tokenizer, text encoder, transformer, causal sampler.

Imports the engine; the engine never imports it. Every stage is a command that resumes after being killed.
"""
