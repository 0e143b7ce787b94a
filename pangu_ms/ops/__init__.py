"""Other forms of the network's formulas, by device: functions of the same names and arguments (`pangu_ms.device`)."""
