"""Adapters of a language model whose two factors were scaled against each other."""
