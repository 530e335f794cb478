"""One test per promise of the contract, section 4 of the design, for the embedded cache. Time is virtual here."""
