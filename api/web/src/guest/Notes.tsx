// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// The guest's description, edited in place.
import { Button, Group, Text, Textarea } from '@mantine/core';
import { useMutation } from '@tanstack/react-query';
import { useState } from 'react';

import { call } from '../api/client';
import { guestPath, refresh } from '../api/queries';
import type { Guest, GuestConfig } from '../api/types';
import { ErrorNote } from '../app/ErrorPage';
import { Panel } from '../ui/Panel';

export function Notes({ guest, config }: { guest: Guest; config: GuestConfig | undefined }) {
  const saved = String(config?.['description'] ?? '');
  const [draft, setDraft] = useState<string | null>(null);
  const save = useMutation({
    mutationFn: (text: string) =>
      call('PUT', `${guestPath(guest)}/config`, { ...(text ? { description: text } : { delete: 'description' }), digest: config?.digest }),
    onSuccess: () => {
      setDraft(null);
      return refresh();
    },
  });
  const edit = (
    <Button variant="subtle" size="compact-xs" onClick={() => setDraft(saved)} disabled={!config}>
      Edit
    </Button>
  );
  return (
    <Panel title="Notes" actions={draft === null ? edit : null}>
      {draft === null ? (
        <Text size="sm" {...(saved ? {} : { c: 'dimmed' })} style={{ whiteSpace: 'pre-wrap' }}>
          {saved || 'Nothing noted.'}
        </Text>
      ) : (
        <>
          <Textarea autosize minRows={3} autoFocus aria-label="Notes" value={draft} onChange={(event) => setDraft(event.currentTarget.value)} />
          <ErrorNote error={save.error} />
          <Group mt="xs" gap="xs">
            <Button onClick={() => save.mutate(draft)} loading={save.isPending} disabled={draft === saved}>
              Save
            </Button>
            <Button variant="default" onClick={() => setDraft(null)}>
              Cancel
            </Button>
          </Group>
        </>
      )}
    </Panel>
  );
}
