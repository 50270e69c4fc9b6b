// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// The list of keys.
import { Kbd, Modal, Table } from '@mantine/core';

const KEYS: [string[], string][] = [
  [['/'], 'Search the tree'],
  [['↑', '↓'], 'Move in the tree'],
  [['←', '→'], 'Close and open a node'],
  [['Enter'], 'Open the chosen row'],
  [['Shift', 'V'], 'Create a virtual machine'],
  [['Shift', 'C'], 'Create a container'],
  [['t'], 'Show or hide the tasks'],
  [['Esc'], 'Close a dialog'],
  [['?'], 'This list'],
];

export function Shortcuts({ opened, onClose }: { opened: boolean; onClose: () => void }) {
  return (
    <Modal opened={opened} onClose={onClose} title="Keyboard shortcuts" size="sm">
      <Table withRowBorders={false}>
        <Table.Tbody>
          {KEYS.map(([keys, meaning]) => (
            <Table.Tr key={meaning}>
              <Table.Td w={110}>
                {keys.map((key) => (
                  <Kbd key={key} mr={4}>
                    {key}
                  </Kbd>
                ))}
              </Table.Td>
              <Table.Td>{meaning}</Table.Td>
            </Table.Tr>
          ))}
        </Table.Tbody>
      </Table>
    </Modal>
  );
}
