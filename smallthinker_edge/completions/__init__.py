"""What users of OpenAI's API and llama-cpp-python know: their calls and the shapes of their answers, sync and async."""
