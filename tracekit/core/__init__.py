"""Floor 0: the words that everything else is said in; no threads and no models here."""
