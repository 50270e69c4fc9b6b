// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Starts and stops the guests of a node together, in the order that their key `startup` says.
import { Button, Checkbox, Menu, Text } from '@mantine/core';
import { IconChevronDown, IconPlayerPlay, IconPower } from '@tabler/icons-react';
import { useState, useSyncExternalStore } from 'react';

import { call, path } from '../api/client';
import { session } from '../api/session';
import { ActionDialog } from '../app/ActionDialog';
import { may } from '../guest/actions';

/** What is asked of all guests: the call, its one choice, and how the choice is put. */
const ACTIONS = {
  startall: {
    label: 'Start all',
    text: 'The guests that start with the node are started, in their order.',
    option: 'force',
    choice: 'Also those that do not start with the node',
    usual: false,
  },
  stopall: {
    label: 'Shut down all',
    text: 'The guests are asked to shut down, the last to start first.',
    option: 'force-stop',
    choice: 'Stop who has not shut down in time',
    usual: true,
  },
} as const;

type Action = keyof typeof ACTIONS;

function BulkDialog({ node, action, onClose }: { node: string; action: Action; onClose: () => void }) {
  const { label, text, option, choice, usual } = ACTIONS[action];
  const [chosen, setChosen] = useState<boolean>(usual);
  const run = () => call<string>('POST', path`/nodes/${node}/${action}`, { [option]: chosen });
  return (
    <ActionDialog title={`${label}: node ${node}`} verb={label} act={run} onClose={onClose} isQuestion>
      {() => (
        <>
          <Text size="sm">{text}</Text>
          <Checkbox size="xs" label={choice} checked={chosen} onChange={(event) => setChosen(event.currentTarget.checked)} />
        </>
      )}
    </ActionDialog>
  );
}

export function BulkActions({ node }: { node: string }) {
  const user = useSyncExternalStore(session.subscribe, session.snapshot);
  const [action, setAction] = useState<Action | null>(null);
  return (
    <>
      <Menu position="bottom-end" withinPortal>
        <Menu.Target>
          <Button variant="default" rightSection={<IconChevronDown size={13} aria-hidden />} disabled={!may(user, 'VM.PowerMgmt')}>
            All guests
          </Button>
        </Menu.Target>
        <Menu.Dropdown>
          <Menu.Item leftSection={<IconPlayerPlay size={15} aria-hidden />} onClick={() => setAction('startall')}>
            {ACTIONS.startall.label}…
          </Menu.Item>
          <Menu.Item leftSection={<IconPower size={15} aria-hidden />} onClick={() => setAction('stopall')}>
            {ACTIONS.stopall.label}…
          </Menu.Item>
        </Menu.Dropdown>
      </Menu>
      {action && <BulkDialog node={node} action={action} onClose={() => setAction(null)} />}
    </>
  );
}
