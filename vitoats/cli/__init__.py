"""The commands, one module each, which ``tools/`` and the console command ``vitoats`` call."""
