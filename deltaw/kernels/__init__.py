"""Operations, each one function with a plain torch reference beside it in the tests."""
