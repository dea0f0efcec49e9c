"""Lightning callbacks: they decide when the functions of this package are called."""
