"""Floor 2: interventions beside a forward pass. Exactly one of {model thread, one worker} runs."""
