"""A package, so that the cluster lives as long as the tests of this folder and no longer."""
