"""Operations without state: rotary positions and attention. Kernel choice stops here."""
