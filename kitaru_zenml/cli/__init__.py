"""The command line: one module a command. A new command is a module and a line in `main.COMMANDS`."""
