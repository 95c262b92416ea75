"""How large a run is: parameters, operations, bytes. Pure functions of numbers, a file a network."""
