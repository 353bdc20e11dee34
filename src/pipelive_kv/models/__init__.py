"""Small models for the tests, the demo and the examples; none is downloaded at run time."""
