"""Work that is skipped at run time: what depends on the input is chosen anew for each."""
