// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// The menus at the right of the header.
import { ActionIcon, Button, Menu, useMantineColorScheme, type MantineColorScheme } from '@mantine/core';
import { IconBox, IconChevronDown, IconDeviceDesktop, IconKeyboard, IconLogout, IconMoon, IconPlus, IconSun, IconSunMoon, IconUser } from '@tabler/icons-react';

import { session } from '../api/session';
import { usePageSearch } from './navigation';

export function CreateMenu() {
  const [, change] = usePageSearch();
  return (
    <Menu position="bottom-end" withinPortal>
      <Menu.Target>
        <Button leftSection={<IconPlus size={14} aria-hidden />} rightSection={<IconChevronDown size={13} aria-hidden />}>
          Create
        </Button>
      </Menu.Target>
      <Menu.Dropdown>
        <Menu.Item leftSection={<IconDeviceDesktop size={15} aria-hidden />} onClick={() => change({ create: 'vm' })}>
          Virtual machine
        </Menu.Item>
        <Menu.Item leftSection={<IconBox size={15} aria-hidden />} onClick={() => change({ create: 'ct' })}>
          Container
        </Menu.Item>
      </Menu.Dropdown>
    </Menu>
  );
}

const SCHEMES: { value: MantineColorScheme; label: string; Icon: typeof IconSun }[] = [
  { value: 'auto', label: 'As the system', Icon: IconSunMoon },
  { value: 'light', label: 'Light', Icon: IconSun },
  { value: 'dark', label: 'Dark', Icon: IconMoon },
];

export function SchemeMenu() {
  const { colorScheme, setColorScheme } = useMantineColorScheme();
  const Current = SCHEMES.find((row) => row.value === colorScheme)?.Icon ?? IconSunMoon;
  return (
    <Menu position="bottom-end" withinPortal>
      <Menu.Target>
        <ActionIcon variant="subtle" color="gray" size={30} aria-label="Colour scheme">
          <Current size={17} />
        </ActionIcon>
      </Menu.Target>
      <Menu.Dropdown>
        {SCHEMES.map(({ value, label, Icon }) => (
          <Menu.Item key={value} leftSection={<Icon size={15} aria-hidden />} onClick={() => setColorScheme(value)} fw={value === colorScheme ? 600 : 400}>
            {label}
          </Menu.Item>
        ))}
      </Menu.Dropdown>
    </Menu>
  );
}

export function UserMenu({ username, onHelp }: { username: string; onHelp: () => void }) {
  return (
    <Menu position="bottom-end" withinPortal>
      <Menu.Target>
        <Button variant="subtle" color="gray" leftSection={<IconUser size={15} aria-hidden />} className="atoll-user">
          {username}
        </Button>
      </Menu.Target>
      <Menu.Dropdown>
        <Menu.Item leftSection={<IconKeyboard size={15} aria-hidden />} onClick={onHelp}>
          Keyboard shortcuts
        </Menu.Item>
        <Menu.Item leftSection={<IconLogout size={15} aria-hidden />} onClick={() => session.end(null)}>
          Sign out
        </Menu.Item>
      </Menu.Dropdown>
    </Menu>
  );
}
