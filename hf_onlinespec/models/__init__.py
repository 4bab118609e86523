"""What users' models are: fingerprints, vocabularies, a second tree over their weights; asked by all four steps."""
