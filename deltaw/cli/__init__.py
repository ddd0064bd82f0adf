"""The command line: one file a command, which only parses and prints. A command's module is imported on use."""
