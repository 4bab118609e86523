"""The draft commits: who proposes tokens, and what a draft is from call to call."""
