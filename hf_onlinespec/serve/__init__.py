"""`hf-onlinespec serve`: an OpenAI-compatible server on transformers' own serving code, with a model that is attached.

Needs the packages of the extra `serve`; nothing else in the package imports this folder.
"""
