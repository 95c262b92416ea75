"""How large a run is: parameters, operations, bytes; formulas of numbers."""
