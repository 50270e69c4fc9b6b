// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// The order in which firmware tries a machine's devices: those that are ticked, from the top down.
import { ActionIcon, Checkbox, Group, Stack, Text } from '@mantine/core';
import { IconArrowDown, IconArrowUp } from '@tabler/icons-react';
import { useState } from 'react';

import { call } from '../api/client';
import { guestPath } from '../api/queries';
import type { Guest } from '../api/types';
import { ActionDialog } from '../app/ActionDialog';
import { labelOf } from '../forms/labels';
import { parse } from '../lib/propertyString';

interface BootDialogProps {
  guest: Guest;
  /** Keys of what it could boot from. */
  devices: string[];
  value: string | undefined;
  digest: string | undefined;
  onClose: () => void;
}

interface Place {
  key: string;
  tried: boolean;
}

/** The devices in their order, then those that are not tried. Without an order all are tried. Pure. */
export function places(value: string | undefined, devices: string[]): Place[] {
  const order = parse(value ?? '')['order'];
  if (order === undefined) return devices.map((key) => ({ key, tried: true }));
  const tried = order.split(';').filter((key) => devices.includes(key));
  return [...tried.map((key) => ({ key, tried: true })), ...devices.filter((key) => !tried.includes(key)).map((key) => ({ key, tried: false }))];
}

/** The list with the entry at `from` moved to `to`. Pure. */
export function moved<T>(list: T[], from: number, to: number): T[] {
  const rest = list.filter((_, index) => index !== from);
  return [...rest.slice(0, to), ...list.slice(from, from + 1), ...rest.slice(to)];
}

export function BootDialog({ guest, devices, value, digest, onClose }: BootDialogProps) {
  const [list, setList] = useState(() => places(value, devices));
  // The digest of the moment the dialog opened: a poll meanwhile must not hide another editor's change.
  const [seen] = useState(digest);
  const save = () => {
    const order = list.filter((place) => place.tried).map((place) => place.key);
    return call<null>('PUT', `${guestPath(guest)}/config`, { boot: `order=${order.join(';')}`, digest: seen });
  };
  const arrow = (index: number, to: number, label: string, Icon: typeof IconArrowUp) => (
    <ActionIcon variant="subtle" color="gray" size="sm" aria-label={`${label}: ${list[index]?.key ?? ''}`} disabled={to < 0 || to >= list.length} onClick={() => setList(moved(list, index, to))}>
      <Icon size={15} />
    </ActionIcon>
  );
  return (
    <ActionDialog title={labelOf('boot')} verb="Save" act={save} onClose={onClose} size="md">
      {() => (
        <>
          <Text size="sm" c="dimmed">
            Firmware tries what is ticked, from the top down. It takes effect at the next start.
          </Text>
          <Stack gap={4} role="list" aria-label="Devices">
            {list.map((place, index) => (
              <Group key={place.key} role="listitem" justify="space-between" wrap="nowrap">
                <Checkbox
                  size="xs"
                  label={labelOf(place.key)}
                  checked={place.tried}
                  onChange={(event) => {
                    const tried = event.currentTarget.checked;
                    setList(list.map((other) => (other === place ? { ...other, tried } : other)));
                  }}
                />
                <Group gap={2} wrap="nowrap">
                  {arrow(index, index - 1, 'Up', IconArrowUp)}
                  {arrow(index, index + 1, 'Down', IconArrowDown)}
                </Group>
              </Group>
            ))}
          </Stack>
        </>
      )}
    </ActionDialog>
  );
}
