"""From a prompt to new tokens: request checks, the compiled engine, text in and out, the command."""
