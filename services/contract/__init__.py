"""What the services share: messages, configuration, streams, policy versions, telemetry. Imports no service and no torch."""
