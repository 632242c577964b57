"""numpy and the standard library only: types, errors, catalog, manifest, golden, preprocess, env."""
