"""The papers' own experiments: a file a study, which says what was published, what is run and at which scale."""
