// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// A guest's console that fills the window; its address can be kept as a bookmark.
import { Text } from '@mantine/core';
import { useNavigate, useParams } from '@tanstack/react-router';
import { useEffect, useSyncExternalStore } from 'react';

import { session } from '../api/session';
import { ErrorNote } from '../app/ErrorPage';
import { useGuest } from '../guest/GuestPage';
import { guestTitle } from '../lib/guest';
import { Console } from './Console';

export function ConsoleWindow() {
  const { vmid } = useParams({ strict: false }) as { vmid: string };
  const signedIn = useSyncExternalStore(session.subscribe, session.snapshot);
  const navigate = useNavigate();
  const { guest, loaded, error } = useGuest(vmid);
  useEffect(() => {
    if (!signedIn) void navigate({ to: '/signin', search: { next: location.pathname }, replace: true });
  }, [signedIn, navigate]);
  useEffect(() => {
    document.title = `${guest ? guestTitle(guest) : vmid} – Console`;
  }, [guest, vmid]);
  return (
    <main className="atoll-window">
      <h1 className="atoll-hidden">Console of guest {vmid}</h1>
      {guest ? <Console guest={guest} alone /> : error ? <ErrorNote error={error} /> : loaded && <Text p="lg">There is no guest {vmid}.</Text>}
    </main>
  );
}
